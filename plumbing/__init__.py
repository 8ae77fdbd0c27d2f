"""What every long run needs: folders, checkpoints, processes, reports. It knows no algorithm."""
