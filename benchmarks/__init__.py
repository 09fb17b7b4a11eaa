"""Every speed claim of the README: side by side with the peer in one run, interleaved, as ratios with their spread."""
