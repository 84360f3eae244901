"""Data sets: adapters, preparation, token store, mixture. No torch in this folder."""
