"""Other engines to measure beside ours. Each module says whether its engine is there and what it cannot run."""
