"""Fine-tuning: adapters of PEFT, on models of lowmem and of transformers."""
