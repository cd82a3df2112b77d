"""What users hold their samples in, as a map-style dataset: datasets, batches, iterators, DataLoaders."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, WeightedRandomSampler

from streamfisher.errors import DataError, first_line


class SampleSource(Protocol):
    """A map-style dataset: `len(source)` samples, `source[i]` a dict of tensors without a batch axis."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


class BatchedTensors:
    """A dict of tensors with one common batch axis, as a map-style dataset.

    Raises:
        DataError: an entry is no tensor, or their first axes differ.
    """

    def __init__(self, batch: Mapping[str, Any]):
        self.batch = {str(key): _batched(value, str(key)) for key, value in batch.items() if value is not None}
        sizes = {key: value.shape[0] if value.ndim else None for key, value in self.batch.items()}
        if len(set(sizes.values())) > 1 or None in sizes.values():
            raise DataError(f"the tensors of the batch must share their first axis; they have sizes {sizes}.")
        self.size = next(iter(sizes.values()), 0)

    def __len__(self) -> int:
        return self.size or 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


class FrameRows:
    """The rows of a pandas frame, as a map-style dataset of dicts."""

    def __init__(self, frame: Any):
        self.frame = frame

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {str(name): self.frame[name].iloc[index] for name in self.frame.columns}


def named_entries(sample: Any) -> Any:
    """Return `(inputs,)` or `(inputs, labels)`, as a TensorDataset gives them, by name; whatever else as it is.

    Whole numbers along an axis are `input_ids`, other inputs `x`.
    """
    pair = isinstance(sample, tuple | list) and 1 <= len(sample) <= 2
    if (
        not pair
        or not isinstance(sample[0], Tensor)
        or not all(isinstance(part, Tensor | int | float) for part in sample)
    ):
        return sample
    is_ids = sample[0].ndim > 0 and sample[0].dtype in (torch.int64, torch.int32)
    return dict(zip(("input_ids" if is_ids else "x", "labels"), sample, strict=False))


def as_source(source: Any, n_samples: int | None = None) -> SampleSource:
    """Return samples as a map-style dataset.

    Args:
        source: a map-style dataset, a dict of batched tensors, a DataLoader whose batches are such, or an iterable.
        n_samples: of what can only be read from the start, no more than so many are; `None` means all.

    Raises:
        DataError: it is nothing of that, or a DataLoader that shuffles.
    """
    if isinstance(source, Mapping):
        refuse_splits(source)
        return BatchedTensors(source)
    if isinstance(source, DataLoader):
        return list(itertools.islice(_unbatched(source), n_samples))
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return FrameRows(source)
    mapped = hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, IterableDataset)
    if mapped and not isinstance(source, str | bytes):
        return source
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return list(itertools.islice(source, n_samples))
    raise DataError(
        f"samples are a {type(source).__name__}; expected a dataset of dicts of tensors or one dict of batched tensors."
    )


def refuse_splits(source: Mapping[Any, Any]) -> None:
    """Refuse a dict of datasets, which are splits and no columns of a batch.

    Raises:
        DataError: it is one.
    """
    if source and all(hasattr(value, "column_names") or isinstance(value, Dataset) for value in source.values()):
        names = ", ".join(map(str, source))
        raise DataError(
            f"samples are a {type(source).__name__} of the splits {names}; give one of them: "
            f"samples[{next(iter(source))!r}]."
        )


def _unbatched(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the samples of a DataLoader, taken out of the batches that its `collate_fn` made.

    Raises:
        DataError: it shuffles, so that no sample would keep its number; or its batches are no dicts of tensors.
    """
    if isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), RandomSampler | WeightedRandomSampler):
        raise DataError(
            "the DataLoader shuffles, and samples must have the same numbers whenever they are read. Give its dataset "
            "(loader.dataset), or a DataLoader with shuffle=False."
        )
    for batch in loader:
        if loader.batch_size is None and loader.batch_sampler is None:
            yield batch
            continue
        batch = named_entries(batch)
        if not isinstance(batch, Mapping):
            raise DataError(
                f"the DataLoader gives batches of the type {type(batch).__name__}; they must be dicts of tensors, as "
                "{'x': ..., 'labels': ...}. Give it a collate_fn that makes such, or give a dataset of dicts."
            )
        samples = BatchedTensors(batch)
        for index in range(len(samples)):
            yield samples[index]


def _batched(value: Any, key: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{key!r} of the batch is no tensor ({type(value).__name__}: {first_line(error)}). Rows of unequal lengths "
            "are given as a list of dicts, one a sample; what is no number is left out."
        ) from error
