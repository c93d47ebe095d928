import os

import torch  # torch alone does not import triton
from hypothesis import Phase, settings

# Triton reads this when it is first imported, and transformers' models import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Laws run on drawn shapes: no deadline for an example, and no explain phase, which takes 30 times as long as the failure.
settings.register_profile("laws", deadline=None, phases=set(Phase) - {Phase.explain}, max_examples=60)
settings.register_profile("laws-ci", settings.get_profile("laws"), derandomize=True, database=None, print_blob=True)
settings.load_profile("laws-ci" if os.environ.get("CI") else "laws")
