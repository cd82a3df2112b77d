"""Tiny, randomly initialised models of many families, each with a batch of unequal lengths. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn

V, T, D = 29, 7, 16  # vocabulary, longest sequence, width
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    **TOKENS,
}
BERT_LIKE = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Entry:
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]  # number of samples -> batched tensors


def text(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Token ids of unequal lengths, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (n, T), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(n):
        mask[i, T - i % 4 :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked(n: int) -> dict[str, Tensor]:
    """Text with labels at about half of the positions."""
    batch = text(n)
    chosen = torch.rand(n, T, generator=torch.Generator().manual_seed(1)) < 0.5
    chosen[:, 0] = True
    labels = torch.where(chosen & (batch["attention_mask"] == 1), batch["input_ids"], -100)
    return {**batch, "labels": labels, "input_ids": batch["input_ids"].masked_fill(chosen, 3)}


def pairs(n: int) -> dict[str, Tensor]:
    """Text with target text of another length."""
    target = text(n, seed=2)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)[:, :5]
    return {**text(n), "labels": labels}


def images(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(n, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 4, (n,), generator=generator)}


def vectors(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "input_ids": torch.randn(n, 6, generator=generator),
        "labels": torch.randint(0, 4, (n,), generator=generator),
    }


def series(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.randn(n, T, 6, generator=generator),
        "labels": torch.randint(0, 4, (n,), generator=generator),
    }


def speech(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {"input_features": torch.randn(n, 8, 16, generator=generator), "labels": pairs(n)["labels"]}


class ResNet(nn.Module):
    """Three convolutions with a residual, batch and group norms, strides, groups and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            self.bn1.running_mean.normal_(0, 0.1)
            self.bn1.running_var.uniform_(0.5, 2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(pixel_values)))
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.head(self.relu(self.down(self.relu(y))).mean((2, 3)))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoder on tokens, with a learned position parameter, batch first or time first."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, padding_idx=0)
        self.position = nn.Parameter(torch.randn(T, D) * 0.1)
        layer = nn.TransformerEncoderLayer(D, 2, 24, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, V)
        self.batch_first = batch_first

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x += self.position[: x.shape[1]]
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x if self.batch_first else x.transpose(0, 1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(True), nn.Linear(8, 4))


def _bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
        decoder_start_token_id=2, forced_eos_token_id=None, **TOKENS,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None, **TOKENS,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=V, d_model=D, d_kv=8, d_ff=24, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _causal(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**{**LLAMA_LIKE, **options}))


def _bert(model: str, config: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, model)(getattr(hf, config)(**{**BERT_LIKE, **options}))


_GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "query_pre_attn_scalar": 8}

ZOO = [
    Entry(
        "GPT-2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=V, n_positions=32, n_embd=D, n_layer=2, n_head=2, **TOKENS)
        ),
        text,
    ),
    Entry("Llama", _causal("LlamaForCausalLM", "LlamaConfig"), text),
    Entry("Mistral", _causal("MistralForCausalLM", "MistralConfig", sliding_window=4), text),
    Entry("Qwen2", _causal("Qwen2ForCausalLM", "Qwen2Config"), text),
    Entry("Qwen3", _causal("Qwen3ForCausalLM", "Qwen3Config"), text),
    Entry("Gemma 2", _causal("Gemma2ForCausalLM", "Gemma2Config", **_GEMMA), text),
    Entry("Gemma 3", _causal("Gemma3ForCausalLM", "Gemma3TextConfig", **_GEMMA), text),
    Entry("Phi", _causal("PhiForCausalLM", "PhiConfig", num_key_value_heads=2), text),
    Entry("GPT-NeoX", _causal("GPTNeoXForCausalLM", "GPTNeoXConfig"), text),
    Entry(
        "OPT",
        _causal("OPTForCausalLM", "OPTConfig", ffn_dim=24, word_embed_proj_dim=D),
        text,
    ),
    Entry(
        "BLOOM",
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=V, hidden_size=D, n_layer=2, n_head=2, **TOKENS)),
        text,
    ),
    Entry(
        "Mixtral (experts)",
        _causal(
            "MixtralForCausalLM",
            "MixtralConfig",
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
        text,
    ),
    Entry(
        "Mamba",
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=V, hidden_size=D, state_size=4, num_hidden_layers=2, **TOKENS)
        ),
        text,
    ),
    Entry("BERT (masked LM)", _bert("BertForMaskedLM", "BertConfig"), masked),
    Entry("RoBERTa (masked LM)", _bert("RobertaForMaskedLM", "RobertaConfig"), masked),
    Entry(
        "DistilBERT (masked LM)",
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=V, dim=D, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32)
        ),
        masked,
    ),
    Entry("ALBERT (shared layers)", _bert("AlbertForMaskedLM", "AlbertConfig", embedding_size=8), masked),
    Entry("T5", _t5, pairs),
    Entry("BART", _bart, pairs),
    Entry("Whisper", _whisper, speech),
    Entry(
        "ViT",
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=D,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                num_labels=4,
            )
        ),
        images,
    ),
    Entry("MLP", mlp, vectors),
    Entry("ResNet", ResNet, images),
    Entry("LSTM", LSTM, series),
    Entry("nn.TransformerEncoder", Encoder, masked),
    Entry("nn.TransformerEncoder (time first)", lambda: Encoder(batch_first=False), masked),
]


def build(entry: Entry) -> nn.Module:
    """The model, with biases and norms moved off their initial zeros and ones, in train mode."""
    torch.manual_seed(0)
    model = entry.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()
