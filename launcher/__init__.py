"""What run.py needs: set-up, a client of ComfyUI, saved workflows to prompts. Standard library only."""
