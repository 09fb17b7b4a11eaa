"""Export checks: what a repository's models must hold, exported, judged and told to CI."""
