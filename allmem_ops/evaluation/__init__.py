"""What a converted model is worth: losses by position, recovery, retrieval, speed and cache bytes, arm against arm."""
