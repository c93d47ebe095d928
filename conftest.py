import os

from hypothesis import Phase, settings

# Laws run on drawn shapes: no deadline for an example, and no explain phase, which takes 30 times as long as the failure.
settings.register_profile("laws", deadline=None, phases=set(Phase) - {Phase.explain}, max_examples=60)
settings.register_profile("laws-ci", settings.get_profile("laws"), derandomize=True, database=None, print_blob=True)
settings.load_profile("laws-ci" if os.environ.get("CI") else "laws")
