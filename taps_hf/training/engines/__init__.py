"""Who runs the target when it answers: transformers in a loop of ours, or vLLM."""
