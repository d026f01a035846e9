"""Ringstone: fast, safe disks for virtual machines."""
