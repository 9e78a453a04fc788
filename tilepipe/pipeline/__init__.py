"""The job: ingest → segment → pyramids as one graph of units; the public verbs."""
