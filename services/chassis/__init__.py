"""What every service shares: lifecycle, gRPC plumbing, the Session and its client. Imports proto and base only."""
