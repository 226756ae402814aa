"""One module per command of `tenfold`, each with `main(argv) -> int`; experiments/cli.py imports them when asked for."""
