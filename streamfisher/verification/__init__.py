"""Is a run still what was written, and would it be written again?"""

from streamfisher.verification.problem import Problem
from streamfisher.verification.verify import verify_manifest

__all__ = [
    # What is found
    "Problem",
    "verify_manifest",
]
