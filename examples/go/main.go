// Enrols a user's key and releases it again, over gRPC with a client certificate.
//
// The example shows three things that every client needs: a deadline on each call, the reason of a refusal, and safe
// retries. Set the broker and the certificate in the environment: KEYBROKER_ENDPOINT (https://host:port), KEYBROKER_CA,
// KEYBROKER_CERT and KEYBROKER_KEY (PEM files).
package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand"
	"net/url"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	keybrokerv1 "keybroker.example/gen/keybroker/v1"
)

const (
	domain  = "keybroker.v1"
	keyName = "example"
	// The time limit of a call with all its attempts.
	deadline = 10 * time.Second
	// Eight attempts outlast the restart of a broker or of its token worker, about one second.
	attempts     = 8
	firstPause   = 20 * time.Millisecond
	longestPause = time.Second
)

// Calls with any other reason fail again in the same way.
var transient = map[string]bool{
	"QUEUE_FULL": true, "RATE": true, "TOKEN_DOWN": true, "STORE_DOWN": true,
	"AUDIT_DOWN": true, "IDENTITY_DOWN": true, "DEADLINE": true,
}

func connect() (*grpc.ClientConn, error) {
	endpoint, err := url.Parse(os.Getenv("KEYBROKER_ENDPOINT"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(os.Getenv("KEYBROKER_CA"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("KEYBROKER_CA has no certificate in PEM form")
	}
	identity, err := tls.LoadX509KeyPair(os.Getenv("KEYBROKER_CERT"), os.Getenv("KEYBROKER_KEY"))
	if err != nil {
		return nil, err
	}
	config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{identity}, MinVersion: tls.VersionTLS12}
	// Disable gRPC's own retries, which do not use the broker's reasons or the request id.
	return grpc.Dial(endpoint.Host, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDisableRetry())
}

// details returns the broker's reason, or "", and the requested delay.
func details(err error) (reason string, delay time.Duration) {
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == domain {
				reason = detail.Reason
			}
		case *errdetails.RetryInfo:
			delay = detail.RetryDelay.AsDuration()
		}
	}
	return reason, delay
}

func isTransient(err error, reason string) bool {
	if reason != "" {
		return transient[reason]
	}
	// A failure without a reason comes from the connection.
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.Canceled
}

// call makes a call with retries. It is safe for reads, and for changes with a request id: all attempts send the same id.
func call(make func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	pause := firstPause
	for attempt := 1; ; attempt++ {
		err := make(ctx)
		if err == nil {
			return nil
		}
		reason, delay := details(err)
		wait := time.Duration(float64(pause) * (0.8 + 0.4*mathrand.Float64()))
		if wait < delay {
			wait = delay
		}
		ends, _ := ctx.Deadline()
		if !isTransient(err, reason) || attempt == attempts || time.Until(ends) <= wait {
			return err
		}
		time.Sleep(wait)
		if pause *= 2; pause > longestPause {
			pause = longestPause
		}
	}
}

func enrol(service keybrokerv1.UserKeyServiceClient, user string) error {
	material := make([]byte, 32)
	if _, err := rand.Read(material); err != nil {
		return err
	}
	id, err := newRequestID()
	if err != nil {
		return err
	}
	// The change has one id for all attempts. A service stores the id together with the planned change.
	request := &keybrokerv1.CreateUserKeyRequest{User: user, KeyName: keyName, KeyMaterial: material, RequestId: id}
	var answer *keybrokerv1.CreateUserKeyResponse
	err = call(func(ctx context.Context) (err error) {
		answer, err = service.CreateUserKey(ctx, request)
		return err
	})
	if err != nil {
		return err
	}
	fmt.Printf("%s: stored as revision %d\n", user, answer.UserKey.Revision)
	return nil
}

func unwrap(service keybrokerv1.UserKeyServiceClient, user string) error {
	request := &keybrokerv1.UnwrapUserKeyRequest{User: user, KeyName: keyName}
	var answer *keybrokerv1.UnwrapUserKeyResponse
	err := call(func(ctx context.Context) (err error) {
		answer, err = service.UnwrapUserKey(ctx, request)
		return err
	})
	if err != nil {
		return err
	}
	// Use the key here, but do not print it.
	fmt.Printf("%s: revision %d, %d bytes\n", user, answer.Revision, len(answer.KeyMaterial))
	return nil
}

// newRequestID returns a random UUID (RFC 9562, version 4).
func newRequestID() (string, error) {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return "", err
	}
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]), nil
}

func run(arguments []string) error {
	if len(arguments) != 2 {
		return errors.New("usage: enrol|unwrap USER")
	}
	connection, err := connect()
	if err != nil {
		return err
	}
	defer connection.Close()
	service := keybrokerv1.NewUserKeyServiceClient(connection)
	switch arguments[0] {
	case "enrol":
		return enrol(service, arguments[1])
	case "unwrap":
		return unwrap(service, arguments[1])
	default:
		return fmt.Errorf("unknown command %q", arguments[0])
	}
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		if reason, _ := details(err); reason != "" {
			fmt.Fprintf(os.Stderr, "error: %s: %s\n", reason, status.Convert(err).Message())
		} else {
			fmt.Fprintf(os.Stderr, "error: %v\n", err)
		}
		os.Exit(1)
	}
}
