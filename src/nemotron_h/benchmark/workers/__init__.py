"""Programs that hold one model each; `serve.py` runs them, `nemotron_h.benchmark.process` talks to them."""
