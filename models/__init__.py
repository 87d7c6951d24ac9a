"""Models for tests, the demo and benchmarks: builders with random weights, and small trained ones with data."""
