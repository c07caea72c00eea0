"""Other implementations of what the operators compute, to time and to compare against."""
