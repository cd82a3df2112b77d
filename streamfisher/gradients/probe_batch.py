"""Which samples the probe looks at."""

from __future__ import annotations

#: The probe takes this many samples: a third tells a batch axis from an axis that happens to have size 2.
PROBE_SAMPLES = 3
