// derp-load: traffic through a derper by Tailscale's own client library, for `testbed/bench relay`.
//
//	one process: clients dial out of two network namespaces and share counters, so that as much is kept
//	in flight as for every other relay
//
//	near client i ── TLS ──> derper ── TLS ──> far client i
//
// What is read from stdin says nothing; its end ends the program.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go4.org/mem"
	"golang.org/x/sys/unix"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/net/netmon"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

const (
	// Before anything is counted.
	lead = 300 * time.Millisecond
	// Nothing came for so long: what was in flight is lost.
	stall = 5 * time.Millisecond
	// A request without an answer is asked again.
	patience = 200 * time.Millisecond
	// Datagrams sent to one receiver before the next one's turn.
	burst = 16
)

type options struct {
	near, far, nearURL, farURL, cert string
	pairs, bytes                     int
	window                           int64
	rate                             float64
	seconds                          float64
	ask                              bool
}

// What is printed.
type result struct {
	BitsPerSecond      float64  `json:"bits_per_second"`
	DatagramsPerSecond float64  `json:"datagrams_per_second"`
	Bytes              uint64   `json:"bytes"`
	TimesNS            []uint64 `json:"times_ns"`
}

func main() {
	log.SetFlags(0)
	var o options
	flag.StringVar(&o.near, "near", "", "network namespace of senders")
	flag.StringVar(&o.far, "far", "", "network namespace of receivers")
	flag.StringVar(&o.nearURL, "near-url", "", "the derper, as senders reach it")
	flag.StringVar(&o.farURL, "far-url", "", "the derper, as receivers reach it")
	flag.StringVar(&o.cert, "cert", "", "its certificate")
	flag.IntVar(&o.pairs, "pairs", 1, "senders and receivers")
	flag.IntVar(&o.bytes, "bytes", 1408, "of a datagram")
	flag.Int64Var(&o.window, "window", 1<<20, "bytes in flight")
	flag.Float64Var(&o.rate, "rate", 0, "bits a second instead; none beside questions")
	flag.Float64Var(&o.seconds, "seconds", 10, "how long")
	flag.BoolVar(&o.ask, "ask", false, "requests and responses, beside a load where there is a rate")
	flag.Parse()
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(3)
	}()
	done, err := run(&o)
	if err != nil {
		log.Fatalf("derp-load: %v", err)
	}
	json.NewEncoder(os.Stdout).Encode(done)
}

func run(o *options) (*result, error) {
	pem, err := os.ReadFile(o.cert)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, errors.New("no certificate in " + o.cert)
	}
	wanted := o.pairs
	if o.ask {
		wanted = 2
	}
	near := make([]*derphttp.Client, wanted)
	far := make([]*derphttp.Client, wanted)
	for i := range wanted {
		if near[i], err = connect(o.near, o.nearURL, roots, "near", i); err != nil {
			return nil, err
		}
		if far[i], err = connect(o.far, o.farURL, roots, "far", i); err != nil {
			return nil, err
		}
	}
	if !o.ask {
		return load(o, near, far), nil
	}
	if o.rate > 0 {
		loaded := *o
		loaded.seconds += 2 * lead.Seconds()
		go load(&loaded, near[1:], far[1:])
		time.Sleep(lead)
	}
	return ask(o, near[0], far[0])
}

func nodeKey(side string, number int) key.NodePrivate {
	sum := sha256.Sum256(fmt.Appendf(nil, "derp-load %s %d", side, number))
	return key.NodePrivateFromRaw32(mem.B(sum[:]))
}

// Dials on a thread inside the namespace: the socket stays there.
func dialIn(netns string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		type outcome struct {
			conn net.Conn
			err  error
		}
		answer := make(chan outcome, 1)
		go func() {
			// Never unlocked: the thread ends with the goroutine and takes its namespace along.
			runtime.LockOSThread()
			namespace, err := os.Open(netns)
			if err == nil {
				err = unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET)
				namespace.Close()
			}
			if err != nil {
				answer <- outcome{nil, err}
				return
			}
			conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
			answer <- outcome{conn, err}
		}()
		got := <-answer
		return got.conn, got.err
	}
}

func connect(netns, url string, roots *x509.CertPool, side string, number int) (*derphttp.Client, error) {
	client, err := derphttp.NewClient(nodeKey(side, number), url, logger.Discard, netmon.NewStatic())
	if err != nil {
		return nil, err
	}
	client.TLSConfig = &tls.Config{RootCAs: roots}
	client.SetURLDialer(dialIn(netns))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := client.Connect(ctx); err != nil {
		return nil, fmt.Errorf("%s client %d: %w", side, number, err)
	}
	return client, nil
}

// Datagrams from every near client to its far one.
func load(o *options, near, far []*derphttp.Client) *result {
	var sent, received, datagrams atomic.Uint64
	progress := make(chan struct{}, 1)
	for _, client := range far {
		go func() {
			for {
				message, err := client.Recv()
				if err != nil {
					return
				}
				if packet, is := message.(derp.ReceivedPacket); is {
					received.Add(uint64(len(packet.Data)))
					datagrams.Add(1)
					select {
					case progress <- struct{}{}:
					default:
					}
				}
			}
		}()
	}
	end := time.Now().Add(lead + time.Duration(o.seconds*float64(time.Second)))
	var senders sync.WaitGroup
	senders.Add(1)
	go func() {
		defer senders.Done()
		send(o, near, end, &sent, &received, progress)
	}()
	time.Sleep(lead)
	begun, bytes, count := time.Now(), received.Load(), datagrams.Load()
	time.Sleep(time.Until(end))
	seconds := time.Since(begun).Seconds()
	done := &result{
		BitsPerSecond:      float64(received.Load()-bytes) * 8 / seconds,
		DatagramsPerSecond: float64(datagrams.Load()-count) / seconds,
		Bytes:              received.Load(),
	}
	senders.Wait()
	return done
}

func send(o *options, near []*derphttp.Client, end time.Time, sent, received *atomic.Uint64, progress chan struct{}) {
	datagram := make([]byte, o.bytes)
	datagram[0] = 4
	first := nodeKeyNumber(near[0])
	keys := make([]key.NodePublic, len(near))
	for i := range near {
		keys[i] = nodeKey("far", first+i).Public()
	}
	begun := time.Now()
	var lost int64
	for turn := 0; time.Now().Before(end); turn++ {
		if o.rate > 0 {
			due := time.Duration(float64(sent.Load()) * 8 / o.rate * float64(time.Second))
			time.Sleep(due - time.Since(begun))
		} else {
			for {
				flight := int64(sent.Load()) - int64(received.Load()) - lost
				if flight+int64(burst*o.bytes) <= o.window || flight <= 0 {
					break
				}
				select {
				case <-progress:
				case <-time.After(stall):
					lost += flight
				}
			}
		}
		i := turn % len(near)
		for range burst {
			if near[i].Send(keys[i], datagram) != nil {
				return
			}
		}
		sent.Add(uint64(burst * o.bytes))
	}
}

// Which of the near clients this is.
func nodeKeyNumber(client *derphttp.Client) int {
	for i := 0; ; i++ {
		if nodeKey("near", i).Public() == client.SelfPublicKey() {
			return i
		}
	}
}

// One request under way at a time.
func ask(o *options, near, far *derphttp.Client) (*result, error) {
	nearKey, farKey := near.SelfPublicKey(), far.SelfPublicKey()
	go func() {
		for {
			message, err := far.Recv()
			if err != nil {
				return
			}
			if packet, is := message.(derp.ReceivedPacket); is {
				far.Send(nearKey, packet.Data)
			}
		}
	}()
	request := make([]byte, o.bytes)
	request[0] = 4
	done := &result{}
	begun := time.Now()
	for number := uint64(1); time.Since(begun).Seconds() < o.seconds; number++ {
		binary.LittleEndian.PutUint64(request[8:], number)
		asked := time.Now()
		if err := near.Send(farKey, request); err != nil {
			return nil, err
		}
		// The derper drops what its queues have no room for; asked again, the answer wakes us.
		again := time.AfterFunc(patience, func() { near.Send(farKey, request) })
		for {
			message, err := near.Recv()
			if err != nil {
				return nil, err
			}
			packet, is := message.(derp.ReceivedPacket)
			if is && len(packet.Data) >= 16 && binary.LittleEndian.Uint64(packet.Data[8:]) == number {
				break
			}
		}
		again.Stop()
		done.TimesNS = append(done.TimesNS, uint64(time.Since(asked)))
	}
	return done, nil
}
