package tests

import (
	"bufio"
	"bytes"
)

func bufioReader(text []byte) *bufio.Reader { return bufio.NewReader(bytes.NewReader(text)) }

// stripComments leaves of a YAML document what is no comment line, to see whether there is anything.
func stripComments(document []byte) []byte {
	var kept []byte
	for line := range bytes.Lines(document) {
		trimmed := bytes.TrimSpace(line)
		if !bytes.HasPrefix(trimmed, []byte("#")) && !bytes.Equal(trimmed, []byte("---")) {
			kept = append(kept, line...)
		}
	}
	return kept
}
