"""The batches of a run as a model gets them: one recipe for the pass, the guard, the stream and the verification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from streamfisher.data.batches import BatchRef, Unit, batches_of, collate
from streamfisher.data.samples import Samples, check_unchanged
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.model_labels import draw_labels, sample_seed
from streamfisher.models.offload import to_model


class ModelBatches(Mapping[BatchRef, dict[str, Tensor]]):
    """Batches by what they hold, put together anew whenever one is looked at: collated, moved, labels drawn.

    Args:
        model: on whose device and in whose dtype they are.
        samples: of the run.
        lengths: tokens of each sample.
        units: whose batches.
        batch_tokens: padded tokens of one batch.
        loss: of the run; it counts where labels are drawn.
        digests: of each sample as it was first read; a sample that has changed since is refused. Empty: not compared.
        label_seed: of labels drawn from the model's own prediction; `None`: labels are those of the data.
        apart: see `batches_of`.
        per_input: so many consecutive samples differ in their labels only.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Samples,
        lengths: Sequence[int],
        units: Sequence[Unit],
        batch_tokens: int,
        *,
        loss: PerSampleLoss,
        label_seed: int | None = None,
        apart: Sequence[int] | None = None,
        digests: Sequence[bytes] = (),
        per_input: int = 1,
    ) -> None:
        self.digests, self.lengths, self.per_input = digests, lengths, per_input
        self.model, self.samples, self.loss, self.label_seed = model, samples, loss, label_seed
        self._of = {unit.index: batches_of(unit, lengths, batch_tokens, apart) for unit in units}
        self._known = {batch: batch for batches in self._of.values() for batch in batches}

    def __getitem__(self, batch: BatchRef) -> dict[str, Tensor]:
        return self.of_samples(batch.samples)

    def __contains__(self, batch: object) -> bool:
        return batch in self._known

    def __iter__(self) -> Iterator[BatchRef]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def of(self, unit: Unit) -> list[BatchRef]:
        """Return the batches of one unit, in order."""
        return self._of[unit.index]

    def shortest(self, batch: BatchRef) -> int:
        """Return the number of the shortest sample of a batch."""
        return min(batch.samples, key=self.lengths.__getitem__)

    def only(self, batches: Iterable[BatchRef]) -> ModelBatches:
        """Return a view of some of them."""
        part = object.__new__(ModelBatches)
        part.model, part.samples, part.loss, part.label_seed = self.model, self.samples, self.loss, self.label_seed
        part.digests, part.lengths, part.per_input = self.digests, self.lengths, self.per_input
        part._of, part._known = self._of, {batch: batch for batch in batches}
        return part

    def of_samples(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Return any samples as one batch."""
        batch = to_model(collate([self._sample(number) for number in numbers]), self.model)
        if self.label_seed is None:
            return batch
        return draw_labels(self.model, batch, self.loss, [sample_seed(self.label_seed, number) for number in numbers])

    def _sample(self, number: int) -> dict[str, Tensor]:
        sample = self.samples[number]
        if self.digests:
            check_unchanged(number, sample, self.digests[number])
        return sample
