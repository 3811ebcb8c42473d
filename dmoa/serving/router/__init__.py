"""The central router: one actor per app, its client, its gate versions."""
