"""Studies of SpeCache: what a small trained model recalls, and what a real one finds in real text."""
