"""Pictures of a run, and the look of all pictures."""

import os

# Read when matplotlib is imported: an unknown backend ends the import, the other one moves pixels.
os.environ["MPLBACKEND"] = "agg"
os.environ.pop("FREETYPE_PROPERTIES", None)
