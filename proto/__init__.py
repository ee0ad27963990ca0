"""The wire: package `tokenrelay.v1`, generated from the .proto files beside this one (`make proto`)."""
