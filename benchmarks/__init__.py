"""Side-by-side runs; every figure quoted in the documentation comes from here."""
