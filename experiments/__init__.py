"""What users run on top of the library: models, data, training, benchmarks, tables and plots.

`python -m experiments.train` trains, `python -m experiments.prepare_data` converts data sets,
`python -m experiments.bench.kernels` and `python -m experiments.bench.training` measure,
`python -m experiments.report` shows runs in one HTML file and writes the tables.

Imports run one way: measuring, data and models; training; reporting; bench; and the commands at the
top, which no room imports (`tests/experiments/test_rooms.py`).
"""
