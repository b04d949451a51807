"""Several drafters inside vLLM: a plugin, which vLLM loads by its entry point.

Nothing else of taps_hf imports this package, and only what vLLM itself asks for imports vLLM.
"""
