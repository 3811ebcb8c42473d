# Set-up, demo, tests. Every target does its own set-up; a second run starts in seconds.
