"""The Open Container Initiative's interfaces: hook, wrapper, specification."""
