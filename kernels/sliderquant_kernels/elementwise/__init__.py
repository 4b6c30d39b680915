"""RMSNorm, SiLU with a gate, and rotary embeddings."""
