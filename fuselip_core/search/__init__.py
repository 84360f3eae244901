"""Search over your own archive: inputs → embed → index. `build` makes and changes an index."""

DEFAULT_INDEX = "index"  # a folder in the current one
DEFAULT_MODEL = "models:/fuselip-sample-tiny@champion"  # what `make demo` registers
