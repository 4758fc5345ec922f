"""Where a checkpoint that carries a plan is served by real processes: transformers under torchrun, vLLM.

Each module reaches for its engine only when it is used, and each reads the plan from the checkpoint's config.
"""
