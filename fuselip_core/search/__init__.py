"""From a registered model to a search over one's own archive: inputs → embed → index, which build changes."""

DEFAULT_INDEX = "index"  # folder, from where the command runs
DEFAULT_MODEL = "models:/fuselip-sample-tiny@champion"  # what `make demo` registers
