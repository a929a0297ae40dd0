"""The command line, and what supervises a mesh on one machine."""

import os

# Read when grpc is imported. What its C core prints comes as an error too, in our words.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
