"""The benchmarks: programs that write the tables of ``docs/benchmarks``."""
