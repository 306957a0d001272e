// Package socket does to the descriptor of a socket what package net does not offer. It sets
// nonblocking mode, duplicates the descriptor without setting blocking mode, makes the system
// refuse new connections, finds those that are still to be accepted, and stops listening.
package socket
