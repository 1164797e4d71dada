"""Measurements. `python -m benchmarks` runs the suite (loss, lora, encoder, decode, step); stages, shards, budget and cost run as
`python -m benchmarks.<name>`. Each writes JSON and a picture."""
