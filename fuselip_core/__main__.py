"""``python -m fuselip_core`` is ``fuselip``."""

from fuselip_core.cli.main import main

if __name__ == "__main__":
    main()
