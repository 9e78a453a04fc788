"""Throughput: the bare network, the engine from memory and the whole pipeline, in one account."""
