"""Many requests, damaged files and malformed messages: whatever comes, each is answered or fails with a sentence."""
