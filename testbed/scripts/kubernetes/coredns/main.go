// Coredns with the plugins a cluster's DNS needs and no others: what talks to the clouds' name services takes minutes to
// build and is never used here. CoreDNS documents this way of choosing plugins for builds of one's own.
package main

import (
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
)

func main() {
	// In the order a question passes them.
	dnsserver.Directives = []string{"health", "ready", "log", "errors", "cache", "loadbalance", "template", "kubernetes"}
	coremain.Run()
}
