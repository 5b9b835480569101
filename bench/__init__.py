"""One program per claim about speed: `python -m bench.NAME`. Results stand in `results/`, their tables in `README.md`."""
