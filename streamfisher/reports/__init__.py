"""What a person reads: tables, pictures, one HTML page, exports."""
