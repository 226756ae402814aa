"""Benchmarks behind `tenfold bench`: what is measured, how, against whom, and on which machine."""
