"""What came of export checks, for people and for CI."""
