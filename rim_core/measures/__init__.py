"""What is read off a model without changing it: probes, directions, lens, attribution, gradients."""
