"""One module per command of `tenfold`, each with `main(argv) -> int`; `cli.py` imports them when asked for."""
