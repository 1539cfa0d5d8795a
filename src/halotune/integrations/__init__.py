"""How other libraries know our adapters: PEFT's types, trainers, pipelines."""
