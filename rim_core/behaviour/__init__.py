"""What a model answers: generation, judges of refusal, rates, coherence."""
