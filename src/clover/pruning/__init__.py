"""From a model to a smaller one, in memory: bases, plan, surgery, and folders that load again."""
